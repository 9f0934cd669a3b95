"""Studies over several runs, and previews of augmentation."""
