"""What a signal is: one file a kind, which reads, writes, scores, shows and counts signals."""
