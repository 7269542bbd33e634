"""Imported chat templates, which are programs: rendered in a confined process, their loss mask proved."""
