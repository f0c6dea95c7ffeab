"""What runs leave behind: records, groups of them, reports, sweeps."""
