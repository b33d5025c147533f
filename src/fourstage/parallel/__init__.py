"""Several devices: strategies, and what each GPU holds."""
