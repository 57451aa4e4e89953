"""Reads run folders and turns them into decisions: a page, pictures, a comment, a scaling law. Imports train at most."""
