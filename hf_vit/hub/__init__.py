"""What goes to the Hub: upload, model cards, demo Spaces."""
