"""Arguments, recipes and the command line that fills them."""
