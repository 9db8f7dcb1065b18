"""Networks: one file a method."""
