"""Export, quantisation, serving and upload of trained models."""
