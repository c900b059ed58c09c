"""What is held against the estimates: published runs and the course assignment."""
