[
  inputs: ["{mix,native,.formatter}.exs", "{config,lib,test}/**/*.{ex,exs}"],
  line_length: 100
]
