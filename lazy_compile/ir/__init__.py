"""The program as a value: graph, branches, operators, and what passes share. Imports errors and config only."""
