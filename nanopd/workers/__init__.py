"""Workers as the parent sees them: the protocol of one, the processes that implement it, and who starts them."""
