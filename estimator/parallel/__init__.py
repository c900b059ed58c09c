"""What several accelerators share, gather and exchange in a step."""
