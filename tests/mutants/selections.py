"""Selections of tests that detect faults in several languages; {} stands for the backend."""

DROPPED = "tests/test_linear.py -k 'every_activation_and_dropout and gelu-all and {}'"
MASKS = "tests/test_row_norm.py -k 'dropout_gradients and {}'"
STORED = "tests/test_row_norm.py -k 'sum_as_it_is_stored and {}'"
EDGES = "tests/test_contract_numbers.py -k 'test_edge_sizes and {}'"
