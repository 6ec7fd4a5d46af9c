"""`hf-d2sd bench`: every strategy side by side in one run, and reports of it."""
