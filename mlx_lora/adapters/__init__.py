"""Low-rank layers over a frozen base, and the choice of the layers that get them."""
