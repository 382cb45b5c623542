"""Action heads: hidden states to normalised action chunks."""
