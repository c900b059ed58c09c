"""The views of `app.py`: widgets and drawing only; every figure comes from `estimator`."""
