"""Result lines and folders: what a campaign writes down and a report reads."""
