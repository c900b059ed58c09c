"""What is asked: the model, the plan of a step, presets and the files they come from; plain validated data."""
