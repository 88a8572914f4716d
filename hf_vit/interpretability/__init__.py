"""What a model looks at, and which explanation to trust."""
