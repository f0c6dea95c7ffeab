"""The classes of one's own pictures: reading, cleaning, the table and the contact sheet, Grad-CAM."""
