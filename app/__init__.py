"""Lead scoring: calibrated, audited probabilities for an admissions CRM."""

__version__ = "0.1.0"
