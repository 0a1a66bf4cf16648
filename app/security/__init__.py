"""Who may ask: credentials and what they allow, and how often one client may ask."""
