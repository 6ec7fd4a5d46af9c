"""The commands that show a pair at work: `hf-d2sd generate`, `chat`, `explain` and `doctor`."""
