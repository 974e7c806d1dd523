"""Whether an optimizer step is taken: measured, decided on the device, and kept from being taken."""
