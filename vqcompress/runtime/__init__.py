"""An artifact that runs."""
