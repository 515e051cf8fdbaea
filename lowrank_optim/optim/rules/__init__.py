"""Rules that more than one family uses: from a gradient to a direction."""
