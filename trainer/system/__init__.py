"""The machine: its heap and its memory."""
