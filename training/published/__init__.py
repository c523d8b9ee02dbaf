"""Published preference data in pickles, read without running them, in the layout of every other set."""
