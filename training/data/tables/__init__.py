"""Tables of images and labels: files, data sets of the Hub, and Python objects."""
