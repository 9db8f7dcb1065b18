"""One file per inference engine; each imports its vendor's package inside its constructor. No torch."""
