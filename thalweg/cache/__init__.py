"""The logical cache: groups, pools, block tables, prefix index, coordinator. Never bytes, never torch."""
