"""The network and its configuration: exactly the files that travel to the Hub beside the weights."""
