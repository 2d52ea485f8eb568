"""Take a trained student out of the laboratory: export with a proof, and prediction on images of any size."""
