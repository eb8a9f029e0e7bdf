"""Result lines and folders: ablations and transfers write them, reports read them."""
