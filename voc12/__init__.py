"""Everything that knows the folders of a PASCAL VOC devkit."""
