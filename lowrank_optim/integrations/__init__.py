"""What other trainers need beside an optimizer; each module needs the library that it is named after."""
