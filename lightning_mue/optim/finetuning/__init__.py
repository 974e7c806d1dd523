"""Groups that are added to an optimizer while a model is finetuned, and their return from a checkpoint."""
