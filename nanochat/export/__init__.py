"""Export wing: trained models as folders that transformers loads."""
