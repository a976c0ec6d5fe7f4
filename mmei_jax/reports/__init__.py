"""What a person reads after an evaluation: tables, pictures, and the page that holds them."""
