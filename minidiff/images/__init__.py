"""Pictures <-> tensors, and what a program does with pictures. It brings PIL: import it where there is a picture."""

from minidiff.images.tensors import load_image, make_image_grid, read_metadata, save_png, to_numpy, to_pil, to_unit

__all__ = ["load_image", "make_image_grid", "read_metadata", "save_png", "to_numpy", "to_pil", "to_unit"]
