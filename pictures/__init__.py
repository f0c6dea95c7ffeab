"""Classifying your own pictures: reading, cleaning, the table and the contact sheet, LayerCAM."""
