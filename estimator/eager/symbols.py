"""The legend: one letter a size, the same in the formulas, in shape suffixes (`x_BTd`) and in the documentation.

A subscript D marks what one of D accelerators holds.
"""

from __future__ import annotations

import sympy

LEGEND = {
    "B": "micro-batch: sequences in one forward pass on one accelerator",
    "T": "sequence length, tokens",
    "L": "number of layers (blocks)",
    "d": "d_model, width of the residual stream",
    "h": "number of query heads",
    "k": "number of key/value heads",
    "g": "query heads served by one key/value head, h / k",
    "e": "head_dim, width of one head",
    "f": "d_ff, hidden width of the feed-forward",
    "V": "vocabulary size",
    "C": "context length, positions that the model holds",
    "n": "CPU threads that PyTorch uses (torch.get_num_threads); scratch of some CPU kernels grows with them",
    "s": "query rows in one tile of the CPU's flash attention",
    "w": "key rows in one tile of the CPU's flash attention",
    "c": "elements in the scratch of the bundled cross entropy on the CPU",
    "z": "elements in the scratch of Lion",
    "p": "the smaller side of the query projection's matrix, min(d, h e)",
    "q": "the smaller side of the key and value projections' matrices, min(d, k e)",
    "u": "the smaller side of the feed-forward's matrices, min(d, f)",
    "r": "rows (tokens) in one chunk of the chunked cross entropy, an eighth of B T rounded up",
    "v": "words in one piece of the gradient that the chunked cross entropy adds up in fp32, an eighth of V rounded up",
    "N": "number of parameters",
    "D": "data-parallel accelerators that share what is sharded",
    "d_D": "rows of a parameter of d on one accelerator: d / D, rounded up",
    "t_D": "rows of a parameter of 3 d on one accelerator: 3 d / D, rounded up",
    "q_D": "rows of a parameter of h e on one accelerator: h e / D, rounded up",
    "k_D": "rows of a parameter of k e on one accelerator: k e / D, rounded up",
    "f_D": "rows of a parameter of f on one accelerator: f / D, rounded up",
    "V_D": "rows of a parameter of V on one accelerator: V / D, rounded up",
    "C_D": "rows of a parameter of C on one accelerator: C / D, rounded up",
    "T_8": "T rounded up to 8: elements in a row of the mask that CUDA's memory-efficient attention adds",
    "T_32": "T rounded up to 32: rows in the log-sum-exp of CUDA's memory-efficient attention",
    "T_128": "T rounded up to 128: rows in the scratch of CUDA's flash attention in backward",
    "e_32": "e rounded up to 32, above 128 to 64: columns in that scratch",
    "a_16": "elements of a head's dq in the backward of CUDA's memory-efficient attention in 16 bits, in whole tiles",
    "a_32": "the same in fp32",
    "d_8": "blocks of 256 elements in a matrix of d by d, rounded up",
    "t_8": "blocks of 256 elements in a matrix of 3 d by d, rounded up",
    "q_8": "blocks of 256 elements in a matrix of h e by d, rounded up",
    "k_8": "blocks of 256 elements in a matrix of k e by d, rounded up",
    "f_8": "blocks of 256 elements in a matrix of f by d, rounded up",
    "V_8": "blocks of 256 elements in a matrix of V by d, rounded up",
    "C_8": "blocks of 256 elements in a matrix of C by d, rounded up",
}

# Positive only: sympy's solve drops the roots of integer symbols that are not integers.
SYMBOLS = {name: sympy.Symbol(name, positive=True) for name in LEGEND}
