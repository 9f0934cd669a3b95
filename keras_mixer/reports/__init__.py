"""Reports on finished runs, as tables, pictures and pages; previews of augmentation."""
