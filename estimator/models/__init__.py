"""Every decoder as the trainer has it, statement by statement, in eager operators: one class a part."""
