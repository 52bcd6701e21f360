"""A tokenizer to touch: its tokens, its codebook and its generator on a page served to this machine alone."""
