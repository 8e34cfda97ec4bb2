"""What people want to know about a model or an artifact."""
