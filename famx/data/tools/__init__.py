"""Work on data sets from the command line: prepare them, look at them."""
