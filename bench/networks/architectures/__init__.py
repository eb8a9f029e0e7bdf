"""The networks of Table II: timm's encoders with a regressor, ViL, HyperIQA, DBCNN and StairIQA."""
