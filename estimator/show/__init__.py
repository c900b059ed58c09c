"""The command line, reports and the formatting of figures."""
