[
  inputs: ["{mix,native,.formatter}.exs", "{config,contract,lib,test}/**/*.{ex,exs}"],
  line_length: 100
]
