"""Low-rank layers over a frozen base, and where they are put."""
